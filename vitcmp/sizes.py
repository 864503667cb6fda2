"""The published sizes of the families, by the names that `get_spec` takes."""

# Sizes: (width, depth, num_heads, mlp_dim). Ti S: arXiv:2012.12877 Table 1; B L H: arXiv:2010.11929 Table 1;
# g G: arXiv:2106.04560 Table 2; So400m: arXiv:2305.13035; gopt: big_vision's g-opt, of SigLIP 2, arXiv:2502.14786.
VIT_SIZES = {
    "ti": (192, 12, 3, 768),
    "s": (384, 12, 6, 1536),
    "b": (768, 12, 12, 3072),
    "l": (1024, 24, 16, 4096),
    "h": (1280, 32, 16, 5120),
    "so400m": (1152, 27, 16, 4304),
    "g": (1408, 40, 16, 6144),
    "gopt": (1536, 40, 16, 6144),
    "G": (1664, 48, 16, 8192),
}
# arXiv:1512.03385, Table 1.
RESNET_SIZES: dict[int, tuple[str, tuple[int, ...]]] = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}
# T S B L XL: arXiv:2201.03545, section 3; atto to nano: arXiv:2301.00808, Appendix A.1.
CONVNEXT_SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
}
# arXiv:1912.11370, section 3.1, and R26 of arXiv:2106.10270, section 3.3; the width factor is 1 to 4.
BIT_DEPTHS: dict[int, tuple[int, ...]] = {
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
CONVNEXT_ALIASES = {"t": "tiny", "s": "small", "b": "base", "l": "large", "xl": "xlarge"}
# The variants of big_vision's models/vit.py (arXiv:2106.04560, Table 2) and the depths of models/bit.py.
BIG_VISION_VITS = ("mu", "Ti", "S", "M", "B", "L", "So400m", "H", "g", "g-opt", "G", "G-opt", "e")
BIG_VISION_BITS = (26, 50, 101, 152, 200)
