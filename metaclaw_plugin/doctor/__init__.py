"""What `metaclaw doctor` looks at: the machine, the configuration, and the services that run."""
