"""The commands of the exporter: flashvlm-export and flashvlm-compile."""
