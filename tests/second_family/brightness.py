"""A scorer, so that `evaluate` has one where no large network is at hand."""


class Brightness:
    name, better, kinds, needs, identity = "brightness", "higher", (), (), "brightness-1"

    def __call__(self, images, cases):
        return [image.mean() / 255 for image in images]
