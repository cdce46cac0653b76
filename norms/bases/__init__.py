"""Base classes that the layers of a family share; norms.channels.PerChannel is the base of nearly all.

batch_statistics.py    statistics of the batch in training, running ones in evaluation: bn, bgn and their kin
running_statistics.py  running mean and variance, per channel or group, or also per domain (norms.running)
per_sample.py          statistics of one sample, or of the channels at one position
per_domain.py          layers that know which domain a sample is from
streaming.py           statistics of earlier batches, too, in training: brn, mabn, online
"""
