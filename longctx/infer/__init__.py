"""A trained model at work: loaded alone or split over ranks, compared with transformers, sampled from."""
