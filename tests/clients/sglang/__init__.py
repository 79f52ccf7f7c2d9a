"""SGLang: its plug-in against fakes of what it uses."""
