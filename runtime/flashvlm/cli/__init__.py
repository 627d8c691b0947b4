"""The commands of the runtime: flashvlm-run and flashvlm-profile."""
