"""Draws the README's pictures: the panel and the views with the phantom, in the stand-in application.

`make screenshots` writes Resources/Screenshots. Panel and views are drawn by real Qt and VTK, but the application
around them is a stand-in (Testing/slicer_harness/README.md), so Slicer's own widgets look different there.
"""

from __future__ import annotations

import sys
from pathlib import Path

from phantom_session import ROOT, Session, phantom_session
from PIL import Image, ImageDraw, ImageFont

FOLDER = ROOT / "Resources" / "Screenshots"
VIEW = 553
PANEL = (560, 1110)
STEP = "adc_signal"
LABEL = "synthetic phantom, drawn by a computer"


def main() -> None:
    """Write overview.png, rationale.png and override.png."""
    FOLDER.mkdir(exist_ok=True)
    with phantom_session((VIEW, VIEW)) as session:
        panel = session.panel
        panel.ui.applyButton.click()
        session.wait()
        if panel.results.current is None:
            raise SystemExit(panel.ui.statusLabel.text)
        panel.ui.show3DCheckBox.setChecked(True)
        for name in session.views.sliceViewNames():
            node = session.views.sliceWidget(name).mrmlSliceNode()
            x, y, z = node.GetFieldOfView()
            node.SetFieldOfView(x * 0.55, y * 0.55, z)  # the gland and what is around it
        session.select(0, STEP)
        session.views.resetThreeDViews()
        three_d = session.views.threeDWidget(0).mrmlViewNode()
        three_d.SetBoxVisible(False)
        three_d.SetAxisLabelsVisible(False)
        _save(_overview(session), "overview.png")
        for name in ("inputsCollapsibleButton", "modelCollapsibleButton", "findingsCollapsibleButton"):
            getattr(panel.ui, name).collapsed = True
        panel.ui.rationaleTree.expand(panel.ui.rationaleTree.currentIndex())
        _save(_beside(_panel(session, (560, 690)), _views(session, ["Red"])), "rationale.png")
        box = panel.ui.answerComboBox
        box.setCurrentIndex(box.findData("adc_normal"))
        box.activated.emit(box.currentIndex)
        _save(_panel(session, (560, 690)), "override.png")


def _overview(session: Session) -> Image.Image:
    three_d = Image.fromarray(session.views.threeDWidget(0).picture())
    views = _views(session, ["Red", "Green", "Yellow"], three_d)
    return _beside(_panel(session, PANEL), views)


def _views(session: Session, names: list[str], *more: Image.Image) -> Image.Image:
    """Two by two, or one; each says that nobody was imaged."""
    pictures = [Image.fromarray(session.views.sliceWidget(name).picture()) for name in names] + list(more)
    columns = 2 if len(pictures) > 1 else 1
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * VIEW + 4 * (columns - 1), rows * VIEW + 4 * (rows - 1)), "white")
    for index, picture in enumerate(pictures):
        ImageDraw.Draw(picture).text((8, VIEW - 22), LABEL, "#ffffff", ImageFont.load_default(13))
        sheet.paste(picture, ((index % columns) * (VIEW + 4), (index // columns) * (VIEW + 4)))
    return sheet


def _panel(session: Session, size: tuple[int, int]) -> Image.Image:
    import slicer

    parent = session.panel.parent
    parent.show()
    slicer.app.processEvents()  # sections that were folded give their room back
    parent.resize(*size)
    slicer.app.processEvents()
    path = session.folder / "panel.png"
    parent.grab().save(str(path))
    return Image.open(path).convert("RGB").crop((0, 0, *size))  # a layout may be slow to give room back


def _beside(left: Image.Image, right: Image.Image) -> Image.Image:
    sheet = Image.new("RGB", (left.width + 4 + right.width, max(left.height, right.height)), "white")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + 4, 0))
    return sheet


def _save(picture: Image.Image, name: str) -> None:
    picture.save(FOLDER / name, optimize=True)
    sys.stdout.write(f"{FOLDER / name}\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
