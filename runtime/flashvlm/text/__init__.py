"""What a bundle's text files are read with: tokenizer and chat template."""
