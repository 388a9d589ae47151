"""The animated SVG picture of the ring."""

import re
import xml.etree.ElementTree as ET
from itertools import groupby

import numpy as np
import pytest

from ringattn.layout import LAYOUTS
from ringattn.visualize import animate, kv_owners, token_owners
from ringattn.visualize.animation import HOP_SECONDS

SVG = "{http://www.w3.org/2000/svg}"


def animations(picture: str, name: str) -> list[tuple[list[str], list[float]]]:
    """(values, times in hops) of all animations of an attribute, or of all motions for "motion"."""
    root, matching = ET.fromstring(picture), []
    for element in root.iter():
        if element.tag.startswith(f"{SVG}animate"):
            assert element.get("repeatCount") == "indefinite"
            values = (element.get("values") or element.get("keyPoints") or "").split(";")
            times = [float(time) for time in (element.get("keyTimes") or "").split(";")]
            assert len(values) == len(times)
            assert times == sorted(times)
            assert times[0] == 0
            assert times[-1] == 1 or element.get("calcMode") == "discrete"
            length = float((element.get("dur") or "").removesuffix("s"))
            if element.get("attributeName", "motion") == name:
                matching.append((values, [time * length / HOP_SECONDS for time in times]))
    return matching


@pytest.mark.parametrize("devices", [3, 4, 8])
def test_shards_follow_the_schedule(devices):
    picture = animate(devices)
    positions = [values for values, _ in animations(picture, "transform")]
    device_at = {values[0]: device for device, values in enumerate(positions)}
    for owner, (values, times) in enumerate(animations(picture, "transform")):
        stops = [device_at[value] for value in values]
        assert [kv_owners(devices)[device][hop] for hop, device in enumerate(stops)] == [owner] * devices
        np.testing.assert_allclose(times, range(devices), atol=0.01)


def test_a_copy_arrives_before_it_is_needed():
    devices = 4
    motions = animations(animate(devices), "motion")
    assert len(motions) == devices
    for points, times in motions:
        point_at = dict(zip(np.round(times, 1), map(float, points), strict=True))
        for hop in range(1, devices):
            assert point_at[hop - 0.2] == point_at[hop] == pytest.approx(hop / (devices - 1), abs=1e-3)


def test_without_smil_copies_are_hidden_behind_their_owner():
    """A copy starts at the centre of a device's circle, which is drawn later and is larger."""
    devices, picture = 4, animate(4)
    root = ET.fromstring(picture)
    copies = [
        group for group in root if group.tag == f"{SVG}g" and group.find(f"{SVG}g/{SVG}animateMotion") is not None
    ]
    circles = [circle for circle in root if circle.tag == f"{SVG}circle" and circle.get("r") == "46"]
    assert len(copies) == len(circles) == devices
    for copy, circle in zip(copies, circles, strict=True):
        assert copy.get("transform") == f"translate({circle.get('cx')} {circle.get('cy')})"
        motion = copy.find(f"{SVG}g/{SVG}animateMotion")
        assert motion is not None
        assert (motion.get("path") or "").startswith("M0,0A")
        assert list(root).index(copy) < list(root).index(circle)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bars_grow_while_the_device_computes(layout):
    devices = 4
    sequence = token_owners(devices, layout)
    bars = iter(animations(animate(devices, layout), "width"))
    for owners in kv_owners(devices):
        for owner, _ in groupby(sequence):
            values, times = next(bars)
            start = max(time for time, value in zip(times, values, strict=True) if value == "0")
            full = min(time for time, value in zip(times, values, strict=True) if value != "0")
            assert (start, full) == pytest.approx((owners.index(owner), owners.index(owner) + 1), abs=0.01)
    assert next(bars, None) is None


def test_the_animation_is_small_and_needs_no_script():
    assert len(animate()) < 20_000
    assert not re.search(r"(?i)<script|javascript|href", animate())


@pytest.mark.parametrize(("devices", "layout", "message"), [(9, "zigzag", "devices=9"), (4, "spiral", "'spiral'")])
def test_a_ring_that_cannot_be_animated_is_refused(devices, layout, message):
    with pytest.raises(ValueError, match=message):
        animate(devices, layout)
