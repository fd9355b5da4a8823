"""The pelvis around the gland: fat, muscles, bone, bladder, rectum, seminal vesicles, placed relative to the gland.

Proportions follow axial T2W images from the perineum to above the bladder neck; values are relative (see Tissue).
"""

from __future__ import annotations

import numpy as np

from MedRationaleLib.synthesis.fields import SLICE_MM, Canvas, Tissue, smooth_curve, uniform

FAT = Tissue(t2w=0.74, s0=0.04, adc=0.4, t2w_texture=0.07, adc_texture=0.15, grain_mm=6)
MUSCLE = Tissue(t2w=0.15, s0=0.34, adc=1.25, t2w_texture=0.03, adc_texture=0.15, grain_mm=3)
MARROW = Tissue(t2w=0.50, s0=0.10, adc=0.35, t2w_texture=0.05, adc_texture=0.12, grain_mm=5)
CORTEX = Tissue(t2w=0.04, s0=0.03, adc=0.10, t2w_texture=0.01, adc_texture=0.05)
URINE = Tissue(t2w=0.95, s0=1.15, adc=2.9, t2w_texture=0.05, adc_texture=0.08, grain_mm=12)
BLADDER_WALL = Tissue(t2w=0.17, s0=0.45, adc=1.35, t2w_texture=0.03)
RECTAL_WALL = Tissue(t2w=0.26, s0=0.62, adc=1.25, t2w_texture=0.06, adc_texture=0.12)
GAS = Tissue(t2w=0.03, s0=0.02, adc=0.05, t2w_texture=0.01, adc_texture=0.02)
STOOL = Tissue(t2w=0.42, s0=0.30, adc=1.1, t2w_texture=0.12, adc_texture=0.25)
GEL = Tissue(t2w=0.90, s0=0.95, adc=2.4, t2w_texture=0.05)
VESICLE = Tissue(t2w=0.72, s0=0.85, adc=1.9, t2w_texture=0.20, adc_texture=0.25, grain_mm=3)
VEIN = Tissue(t2w=0.70, s0=0.55, adc=1.7, t2w_texture=0.20, adc_texture=0.25, grain_mm=2.5)
FLOW_VOID = Tissue(t2w=0.04, s0=0.10, adc=1.0, t2w_texture=0.01)
SPHINCTER = Tissue(t2w=0.24, s0=0.55, adc=1.3, t2w_texture=0.05, grain_mm=3)


def gland_frame(gland: np.ndarray, canvas: Canvas) -> dict[str, np.ndarray]:
    """Per-slice centre and half-axes of the gland in mm, extended beyond apex and base, and z relative to both."""
    slices = np.flatnonzero(gland.any((1, 2)))
    x, y = canvas.x[0, 0], canvas.y[0, :, 0]
    count = gland.shape[0]
    if slices.size == 0:
        zero = np.zeros(count)
        return {"cx": zero, "cy": zero, "rx": zero + 20, "ry": zero + 16, "apex": zero - 99, "base": zero + 99}
    cx, cy, rx, ry = (np.zeros(slices.size) for _ in range(4))
    for i, s in enumerate(slices):
        rows, columns = np.nonzero(gland[s])
        cx[i], cy[i] = x[columns].mean(), y[rows].mean()
        rx[i], ry[i] = np.ptp(x[columns]) / 2 + 0.4, np.ptp(y[rows]) / 2 + 0.4
    every = np.arange(count)
    frame = {k: np.interp(every, slices, v) for k, v in {"cx": cx, "cy": cy, "rx": rx, "ry": ry}.items()}
    frame["apex"] = (every - slices[0]) * SLICE_MM
    frame["base"] = (every - slices[-1]) * SLICE_MM
    return frame


def paint_pelvis(canvas: Canvas, gland: np.ndarray) -> None:
    """Fill the canvas with everything that is not prostate."""
    rng = canvas.rng
    frame = gland_frame(gland, canvas)
    count = gland.shape[0]
    cx, cy = (smooth_follow(frame[k]) for k in ("cx", "cy"))
    rx = np.full(count, frame["rx"].max())
    ry = np.full(count, frame["ry"].max())
    apex, base = frame["apex"], frame["base"]
    curve = lambda mm: mm * smooth_curve(rng, 4, count)  # noqa: E731
    tissue = {k: v.jittered(rng) for k, v in globals().items() if isinstance(v, Tissue)}
    for target, value, texture in (
        (canvas.t2w, tissue["FAT"].t2w, 0.8 * tissue["FAT"].t2w_texture),
        (canvas.s0, tissue["FAT"].s0, 0.02),
        (canvas.adc, tissue["FAT"].adc, tissue["FAT"].adc_texture),
    ):
        target += value + texture * canvas.textures.sample(6)
    strands = canvas.textures.sample(3)
    canvas.t2w *= 1 - uniform(rng, 0.0, 0.3) * np.clip(strands - 1.2, 0, 1)

    def put(name: str, *shape, **options) -> None:
        mask, box = canvas.ellipse(*shape, **options)
        if mask.size:
            canvas.paint(mask, tissue[name], box)

    wall = uniform(rng, 16, 26)  # from the gland to the obturator muscle's inner border
    for side in (-1, 1):
        # acetabulum and femoral head above, ischium below: cortical rim, then marrow
        lateral = cx + side * (rx + wall + uniform(rng, 24, 32)) + curve(1.5)
        high = np.clip((apex - 6) / 12, 0, 1)
        for name, shrink in (("CORTEX", 0.0), ("MARROW", uniform(rng, 1.5, 3.0))):
            put(name, lateral + side * 8, cy - 8 + curve(1), (24 - shrink) * high, (26 - shrink) * high, warp=0.1)
            put(name, lateral - side * 9, cy + 12 + curve(1), 9 - shrink, 17 - shrink, angle=side * 0.3, warp=0.2)
        # obturator internus, gluteus, pectineus and obturator externus
        put(
            "MUSCLE",
            cx + side * (rx + wall + 5) + curve(1.5),
            cy + uniform(rng, -6, 6),
            uniform(rng, 4.5, 8),
            uniform(rng, 26, 38),
            angle=side * uniform(rng, -0.15, 0.25),
            warp=0.2,
            power=2.6,
        )
        put(
            "MUSCLE",
            cx + side * uniform(rng, 52, 66),
            cy + ry + uniform(rng, 44, 56),
            uniform(rng, 34, 46),
            uniform(rng, 16, 26),
            angle=side * uniform(rng, -0.3, 0.1),
            warp=0.25,
        )
        low = np.clip((14 - apex) / 14, 0, 1)
        put(
            "MUSCLE",
            cx + side * (rx + uniform(rng, 26, 36)),
            cy - ry - uniform(rng, 4, 12),
            34 * low,
            13 * low,
            angle=side * uniform(rng, 0.4, 0.75),
            warp=0.2,
        )
        put(
            "MUSCLE",
            cx + side * uniform(rng, 62, 76),
            cy - ry - uniform(rng, 24, 36),
            uniform(rng, 14, 22),
            uniform(rng, 9, 15),
            angle=side * 0.5,
            warp=0.3,
        )
        # levator ani: a thin sling that closes under the apex
        near = np.clip(1 - (apex - 10) / 22, 0, 1)
        put(
            "MUSCLE",
            cx + side * (rx * np.clip(0.55 + apex / 50, 0.45, 1.0) + uniform(rng, 3, 6)) + curve(0.7),
            cy + uniform(rng, 2, 10),
            1.6 + 1.8 * near,
            ry * uniform(rng, 0.9, 1.3),
            angle=side * uniform(rng, -0.25, 0.05),
            soft_mm=0.8,
            warp=0.2,
        )
        # femoral vessels, periprostatic veins and the neurovascular bundle
        for _ in range(2):
            put("FLOW_VOID", cx + side * uniform(rng, 46, 66), cy - ry - uniform(rng, 22, 40), *rng.uniform(3, 6, 2))
        for _ in range(int(rng.integers(1, 4))):
            angle = uniform(rng, -0.2, 0.9)
            put(
                "VEIN",
                cx + side * (rx + 4) * np.cos(angle),
                cy + (ry + 3) * np.sin(angle),
                uniform(rng, 2, 5),
                uniform(rng, 2, 6),
                warp=0.4,
            )
    # pubic symphysis, dorsal venous complex, rectus
    symphysis = np.clip((24 - base) / 10, 0, 1) * np.clip((apex + 26) / 10, 0, 1)
    front = cy - ry - uniform(rng, 16, 24)
    for side in (-1, 1):
        put("CORTEX", cx + side * 15, front - 6, 15 * symphysis, 11 * symphysis, angle=side * 0.5, warp=0.15)
        put("MARROW", cx + side * 15, front - 6, 13 * symphysis, 9 * symphysis, angle=side * 0.5, warp=0.15)
    put("CORTEX", cx, front - 4, 2.0 * symphysis, 12 * symphysis)
    put("VEIN", cx, cy - ry - 5, uniform(rng, 9, 16) * np.clip((20 - apex) / 20, 0, 1), uniform(rng, 3, 6), warp=0.3)
    put("MUSCLE", cx, cy - ry - uniform(rng, 52, 66), uniform(rng, 30, 40), uniform(rng, 5, 9), warp=0.2)
    # bladder: wall, then urine; it sits in front of and above the base
    if rng.random() < 0.97:
        above = base + uniform(rng, 6, 34)
        full = uniform(rng, 0.5, 1.2) * np.sqrt(np.clip(above / 22, 0, 1))
        bx, by, thick = uniform(rng, 20, 36), uniform(rng, 12, 26), uniform(rng, 2, 5.5)
        if rng.random() < 0.35:
            thick = uniform(rng, 5.5, 9)  # hypertrophic, as behind a large transition zone
        by_c = cy - ry * np.clip(1 - base / 30, 0.0, 1.0) - by * 0.75 * np.clip(1 - (base - 3) / 30, 0.25, 1) + curve(1)
        put("BLADDER_WALL", cx + curve(1), by_c, (bx + thick) * full, (by + thick) * full, warp=0.25)
        # its neck: detrusor between base and lumen, as dark as the anterior stroma that it continues
        if rng.random() < 0.6:
            neck = np.clip((base + uniform(rng, 3, 12)) / 5, 0, 1) * np.clip((uniform(rng, 3, 15) - base) / 4, 0, 1)
            put(
                "BLADDER_WALL",
                frame["cx"] + curve(1.5),
                frame["cy"] - frame["ry"] * uniform(rng, 0.2, 1.0),
                frame["rx"] * uniform(rng, 0.4, 0.9) * neck,
                uniform(rng, 6, 14) * neck,
                warp=0.35,
            )
        put("URINE", cx, by_c, bx * full - thick, by * full - thick, warp=0.25)
    # seminal vesicles with their ducts above and behind the base
    vesicle = np.clip((base + 7) / 5, 0, 1) * np.clip((uniform(rng, 14, 26) - base) / 5, 0, 1)
    back = frame["cy"] + frame["ry"] * np.clip(1 - (base + 6) / 18, 0.1, 0.8)
    for side in (-1, 1):
        put(
            "VESICLE",
            cx + side * uniform(rng, 9, 16),
            back + curve(1),
            uniform(rng, 9, 16) * vesicle,
            uniform(rng, 3.5, 7) * vesicle,
            angle=side * uniform(rng, -0.3, 0.1),
            warp=0.4,
        )
    # puborectal sling: under the apex the levator fills what is between urethra and obturator muscle
    if rng.random() < 0.6:
        sling = np.clip((uniform(rng, 0, 5) - apex) / 5, 0, 1)
        put(
            "MUSCLE",
            frame["cx"] + curve(1),
            frame["cy"] + uniform(rng, 0, 9),
            uniform(rng, 11, 20) * sling,
            uniform(rng, 11, 22) * sling,
            warp=0.2,
        )
    # rectum; below the apex the anal canal, as a thick muscular ring
    canal = np.clip((2 - apex) / 12, 0, 1)
    radius = uniform(rng, 8, 18) * (1 + 0.15 * smooth_curve(rng, 4, count)) * (1 - canal) + uniform(rng, 9, 12) * canal
    gap = uniform(rng, 0.0, 3.5)
    rcy = cy + ry * (1 - 0.3 * canal) + gap + radius * 0.92
    rcx = cx + curve(2.5) + uniform(rng, -3, 3)
    wall_mm = uniform(rng, 2, 4) * (1 - canal) + radius * uniform(rng, 0.5, 0.75) * canal
    put("MUSCLE", rcx, rcy, radius * 1.12 + 2 * canal, radius + 2 + 3 * canal, warp=0.15)
    put("RECTAL_WALL", rcx, rcy, radius * uniform(rng, 0.95, 1.2), radius, warp=0.2)
    content = rng.choice(["GAS", "STOOL", "GEL", "RECTAL_WALL"], p=[0.35, 0.35, 0.1, 0.2])
    put(
        str(content),
        rcx,
        rcy,
        np.maximum(radius - wall_mm, 0) * uniform(rng, 0.8, 1.1),
        np.maximum(radius - wall_mm, 0),
        warp=0.3,
    )
    if content == "GAS" and rng.random() < 0.5:
        put("STOOL", rcx, rcy + radius * 0.35, (radius - wall_mm) * 0.8, (radius - wall_mm) * 0.4, warp=0.2)
    # membranous urethra with its sphincter, penile bulb and crura below the apex
    below = np.clip(-apex / 3, 0, 1)
    put(
        "SPHINCTER",
        frame["cx"],
        frame["cy"] + curve(0.5),
        uniform(rng, 6, 10) * below,
        uniform(rng, 6, 10) * below,
        warp=0.15,
    )
    put("VEIN", frame["cx"], frame["cy"], uniform(rng, 1, 4) * below, uniform(rng, 1, 4) * below)
    bulb = np.clip((-apex - 12) / 6, 0, 1)
    put(
        "URINE" if rng.random() < 0.5 else "VEIN",
        cx,
        cy + uniform(rng, -4, 4),
        uniform(rng, 8, 13) * bulb,
        uniform(rng, 7, 11) * bulb,
        warp=0.2,
    )
    # whatever else: bowel, nodes, vessels, fluid
    for _ in range(int(rng.integers(2, 7))):
        name = str(rng.choice(["FLOW_VOID", "VEIN", "STOOL", "MUSCLE", "URINE", "MARROW"]))
        centre = rng.uniform(-85, 85, 2)
        if np.hypot(centre[0] - cx.mean(), centre[1] - cy.mean()) > 32:
            extent = np.clip(1 - np.abs(np.arange(count) - rng.uniform(0, count)) / uniform(rng, 2, 10), 0, 1) ** 0.5
            put(name, *centre, rng.uniform(2, 12) * extent, rng.uniform(2, 12) * extent, warp=0.4)


def smooth_follow(values: np.ndarray) -> np.ndarray:
    """The surroundings follow the gland's centre only loosely."""
    return 0.5 * values + 0.5 * values.mean()
