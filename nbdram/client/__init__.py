"""The client's side: looking at servers, and what Linux needs to mount their exports."""
