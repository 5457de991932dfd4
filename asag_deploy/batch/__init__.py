"""Detection over any number of pictures, on one machine or on many, with Ray Data; results are Parquet files.

A run is a folder: what it was begun with, its index of pictures, cut into *parts* of fixed pictures, and one
file of results for each part.  That has its part's name, and appears whole or not at all.  So what is done is
what is there, and a run that goes on does the rest, whatever has ended it and however often.
"""
