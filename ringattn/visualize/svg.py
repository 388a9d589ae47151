"""What the SVG pictures share: colours, sizes, and the two shapes they are made of."""

# Okabe and Ito's, which colour-blind people tell apart; black text is legible on all of them.
COLOURS = ("#E69F00", "#56B4E9", "#2CB58A", "#CC79A7", "#F0E442", "#7A9BE0", "#E8804A", "#B0B0B0")
UNSEEN = "#E4E7EB"
DEVICE = 46.0
"""A device's radius in pixels."""
OPENING = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
    'font-family="system-ui, -apple-system, Helvetica, Arial, sans-serif" font-size="15" text-anchor="middle">'
)


def check_devices(devices: int) -> None:
    """Raises ValueError for a ring that is too small to be one, or has more devices than there are colours."""
    if not 3 <= devices <= len(COLOURS):
        raise ValueError(f"devices={devices} must be from 3 to {len(COLOURS)}, for so many colours there are: use 4")


def rect(x: float, y: float, width: float, height: float, fill: str, more: str = ' rx="4"') -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"{more}/>'


def text(x: float, y: float, words: str, size: int = 15) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="#1F2328">{words}</text>'
