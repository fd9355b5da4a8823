"""The model: f_img, f_txt, f_mask and their joint space. The only room of the engine that imports torch at file scope."""
