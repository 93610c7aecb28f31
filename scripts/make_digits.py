"""Write data/digits: the UCI handwritten digits of scikit-learn, as an image folder.

Run once by the project's developers; its result is part of the repository. Every fifth image of a
class goes to val. Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits",
UCI repository, 1998 (CC BY 4.0).
"""

from pathlib import Path

import cv2
import numpy as np
from sklearn.datasets import load_digits

FOLDER = Path(__file__).resolve().parents[1] / "data" / "digits"


def main():
    digits = load_digits()
    seen = np.zeros(10, int)
    for number, (image, label) in enumerate(zip(digits.images, digits.target)):
        split = "val" if seen[label] % 5 == 4 else "train"
        seen[label] += 1
        folder = FOLDER / split / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"{number:04d}.png"), np.rint(image * 255 / 16).astype(np.uint8))


if __name__ == "__main__":
    main()
