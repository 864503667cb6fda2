"""What an arm sees of a picture: resized to the information's size, then to the compute's size, as in big_vision.

The chain of PaliGemma's configs, `decode|resize(224)|resize(448)|value_range(-1, 1)`, without its last step, which the
trainer does on the device: a square stretch, bilinear and antialiased, cut off to uint8 after each resize.
"""

import dataclasses
import math

import numpy as np

from vitcmp.resample import METHODS, resize
from vitcmp.specs import did_you_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocess:
    """(h, w, 3) uint8 -> (compute, compute, 3): uint8, or float32 in [0, 255] where `truncate` is off.

    `stretch` ignores the aspect ratio; without it the central square is taken first. A picture that already has the
    size is left alone, whatever the method. Resizing is computed in float64 and rounded to float32 before it is cut
    off, so that 127.9999999, which should be 128, is 128; TensorFlow, in float32 throughout, gives 127 now and then.
    """

    information: int
    compute: int
    method: str = "bilinear"
    antialias: bool = True
    truncate: bool = True
    stretch: bool = True

    def __post_init__(self) -> None:
        sizes = {"information": self.information, "compute": self.compute}
        faults = [f"{name}={size!r} must be a whole number of pixels, 1 or more" for name, size in sizes.items()
                  if not isinstance(size, int) or isinstance(size, bool) or size < 1]  # fmt: skip
        if self.method not in METHODS:
            faults.append(f"unknown method {self.method!r}{did_you_mean(self.method, METHODS)}: {', '.join(METHODS)}")
        if faults:
            raise ValueError("; ".join(faults))

    def __call__(self, image: np.ndarray) -> np.ndarray:
        image = image if self.stretch else central_square(image)
        for size in (self.information, self.compute):
            image = self._resize(image, size)
        return image if self.truncate else image.astype(np.float32)

    @property
    def dtype(self) -> type:
        return np.uint8 if self.truncate else np.float32

    def _resize(self, image: np.ndarray, size: int) -> np.ndarray:
        if image.shape[:2] == (size, size):
            return image
        resized = resize(image, (size, size), method=self.method, antialias=self.antialias)
        resized = np.clip(resized, 0, 255)  # bicubic and Lanczos overshoot
        return resized.astype(np.uint8) if self.truncate else resized


def central_square(image: np.ndarray) -> np.ndarray:
    side = min(image.shape[:2])
    top, left = ((length - side) // 2 for length in image.shape[:2])
    return image[top : top + side, left : left + side]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """Random changes of training images, drawn by (seed, epoch, example): every arm sees the same ones. Off by default.

    `flip` mirrors half of the images, left to right. `crop_area` = (least, most) takes a rectangle of that share of the
    image, of an aspect ratio of 3/4 to 4/3 (Inception, arXiv:1409.4842, section 6), cut off where the image ends, where
    others draw again; it is then stretched to the square.
    """

    flip: bool = False
    crop_area: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.crop_area is None:
            return
        if len(self.crop_area) != 2 or not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ValueError(f"crop_area={self.crop_area!r} must be (least, most), shares with 0 < least <= most <= 1")

    def crop(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Returns a view of the (h, w, 3) image, by the first four of the `draws` in [0, 1)."""
        if self.crop_area is None:
            return image
        height, width = image.shape[:2]
        least, most = self.crop_area
        area = (least + draws[0] * (most - least)) * height * width
        aspect = math.exp((2 * draws[1] - 1) * math.log(4 / 3))
        crop_height = min(max(round(math.sqrt(area / aspect)), 1), height)
        crop_width = min(max(round(math.sqrt(area * aspect)), 1), width)
        top, left = (int(draw * (1 + slack)) for draw, slack in
                     zip(draws[2:4], (height - crop_height, width - crop_width), strict=True))  # fmt: skip
        return image[top : top + crop_height, left : left + crop_width]

    def mirror(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Returns the image or its mirror image, by the fifth of the `draws`."""
        return image[:, ::-1] if self.flip and draws[4] < 0.5 else image


def order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """Returns the order of an epoch's examples: a permutation, the same on every machine.

    It ranks the raw numbers of Philox, whose stream is fixed for good; that of `Generator.permutation` may change with
    numpy's version (NEP 19).
    """
    return np.argsort(_philox(seed, epoch, 0, 0).random_raw(num_examples), kind="stable")


def draw(seed: int, epoch: int, index: int) -> np.ndarray:
    """Returns five numbers in [0, 1) for one example of an epoch, independent of all others and of the order."""
    return (_philox(seed, epoch, index, 1).random_raw(5) >> 11) * 2.0**-53


def _philox(seed: int, epoch: int, index: int, stream: int) -> np.random.Philox:
    # The key has two words; of the counter's four the lowest one counts the numbers drawn.
    return np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=np.array([0, index, stream, 0], np.uint64))
