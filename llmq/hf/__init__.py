"""The only part of the library that imports transformers: `source` gets models in, `serving` runs quantized ones."""
