"""What each kind of layer does in an SP step. Modules are found by their structure, and never by a model's name."""
