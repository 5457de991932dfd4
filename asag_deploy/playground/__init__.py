"""`asag-playground`: a page to try a bundle on, which shows how probing decided."""
