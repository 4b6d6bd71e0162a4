"""GGUF for llama.cpp, and the folders of Ollama and LM Studio around it. `names` is shared by writers and readers."""
