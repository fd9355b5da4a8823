"""The model: f_img, f_txt, f_mask and their joint space. The engine's only room with torch at file scope."""
