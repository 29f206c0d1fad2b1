"""From pictures to draws.

images          reads a folder of images and captions
crop            the crop of a patch (docs/method.md, Eq. 1), in numpy
patch_sampler   the same crop and its resizing, as a torch module
draws           which draws a bank holds
"""
