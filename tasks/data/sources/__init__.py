"""The kinds of data sets, one file each; each says what the catalog needs of it (tasks.data.source.Source).

builtin.py    what the sets built in share: files of this repository
fashion.py    built in: Fashion-MNIST mini, plain and shifted
digits.py     built in: digits in four domains
glyphs.py     built in: characters in many text faces
faces.py      renders the characters of glyphs and digits, to rebuild them
downloads.py  torchvision's, from archives
joined.py     several downloaded ones, one domain each
stored.py     what the sets share that `prepare` writes into data_dir
folder.py     folders of images: `folder:PATH`, and `imagenet`
memory.py     a user's arrays
checked.py    what a user's own source gives, looked at
"""
