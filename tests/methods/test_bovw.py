"""Bags of visual words: scikit-learn's own checks, codings by their formulas, dictionaries that find what is there."""

import json

import numpy as np
import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from tilestream.methods.bovw import BagOfVisualWords, search_svm


@parametrize_with_checks([BagOfVisualWords(words=2), BagOfVisualWords(2, "hard"), BagOfVisualWords(2, "soft", "mean")])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)
