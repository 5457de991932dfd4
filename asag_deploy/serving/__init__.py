"""`asag-serve`: a detector behind HTTP.  `app` is what it answers, `server` how it listens."""
