"""From pictures to draws.

folder          what a folder holds, and what is left out
captions        where a picture's caption comes from
images          reads one picture
colour          depth, transparency and colour profile of a decoded picture
dataset         all pictures of a folder with their captions, each decoded when it is used
crop            the crop of a patch (docs/method.md, Eq. 1), in numpy
draws           which draws a bank holds
filling         fills a bank, whoever makes its draws
tiles           large pictures through an autoencoder piece by piece
sheet           pictures on one sheet
"""
