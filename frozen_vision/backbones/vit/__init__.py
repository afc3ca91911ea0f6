"""Plain vision transformers: DeiT, AugReg, DINO, MAE, DINOv2, DINOv3, CLIP, SigLIP."""
