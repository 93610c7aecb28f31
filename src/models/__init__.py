"""What is computed: networks, blocks and their fusion, names and files of weights."""
