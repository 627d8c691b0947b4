"""Selection methods: which visual tokens a budget keeps."""
