"""Colours, sizes and shapes of the SVG pictures."""

# Okabe and Ito's palette for colour-blind readers, lightened where black text would be hard to read on it.
COLOURS = ("#E69F00", "#56B4E9", "#2CB58A", "#CC79A7", "#F0E442", "#7A9BE0", "#E8804A", "#B0B0B0")
NOT_ATTENDED = "#E4E7EB"
DEVICE_RADIUS = 46.0
"""In pixels."""
OPENING = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
    'font-family="system-ui, -apple-system, Helvetica, Arial, sans-serif" font-size="15" text-anchor="middle">'
)


def check_devices(devices: int) -> None:
    """Raises ValueError unless the ring has at least 3 devices and at most one per colour."""
    if not 3 <= devices <= len(COLOURS):
        raise ValueError(f"devices={devices} must be from 3 to {len(COLOURS)}, one colour per device; use 4")


def rect(x: float, y: float, width: float, height: float, fill: str, more: str = ' rx="4"') -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"{more}/>'


def text(x: float, y: float, words: str, size: int = 15) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="#1F2328">{words}</text>'
