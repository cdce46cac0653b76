"""Networks that take any norm.

blocks.py       the one place that pairs convolution, norm and activation
resnet.py       the CIFAR ResNets, resnet18_narrow and resnet18_cifar
conv4.py        Conv-4, of few-shot learning
resnet12.py     ResNet-12, of few-shot learning
torchvision.py  torchvision's networks
guests.py       a user's network (register_model) and timm's
init.py         initial weights, drawn by the parameter's name
models.py       all of them by name

DARTS' networks stay with their task, tasks/architecture_search.
"""
