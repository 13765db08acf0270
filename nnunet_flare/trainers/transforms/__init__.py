"""Transforms that batchgeneratorsv2 lacks, in its idiom: sample the parameters, then apply them."""
