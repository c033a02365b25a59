"""Our ops inside other people's models. Each module here needs the package it is named after and imports it."""
