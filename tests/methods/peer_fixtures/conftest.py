# These need an environment of their own, with torch; what they made is stored beside them.
collect_ignore = ["make_fixtures.py", "of_trl.py", "of_trl_pairs.py", "of_verl.py"]
