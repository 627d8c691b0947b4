"""Where the milliseconds and megabytes go: measured by the runtime itself, or by trtexec."""
