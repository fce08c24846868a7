"""Networks and data sets that collections are made from."""
