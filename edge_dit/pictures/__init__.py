"""From pictures to draws: read images, crop them by Eq. 1, choose the draws of a bank."""
