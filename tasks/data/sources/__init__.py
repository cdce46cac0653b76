"""The kinds of data sets, one file each; each says what the catalog needs of it (tasks.data.source.Source).

| file | sets |
| --- | --- |
| fashion, digits, glyphs | built in: files of this repository (builtin) |
| downloads | torchvision's, from archives (archives) |
| joined | several downloaded ones, one domain each |
| folder | folders of images: `folder:PATH`, and `imagenet` |
| memory | a user's arrays |
| checked | looks at what a user's own source gives |
"""
