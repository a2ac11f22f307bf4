"""`ssl-report`: tables, plots and a page from the files of many runs. Imports neither torch nor Hydra."""
