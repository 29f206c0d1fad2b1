"""What families are made of, and what several of them share: rules of configurations, one sequence
of text and image, packed latents, rotations in real numbers.
"""
