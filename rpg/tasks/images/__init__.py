"""Sets of labelled images: from Parquet files, from folders by class, and from torchvision's own files."""
