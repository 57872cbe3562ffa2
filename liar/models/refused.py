"""Types of models that people ask for and that cannot be cut, with the reason."""

SHARED = "its layers share one block, so they cannot be cut one by one"
STATES = "it has no heads or neurons between two linear layers, but a recurrence over states"

REFUSED = {
    "albert": SHARED,
    "clip": "it has two models, of texts and of images: cut model.text_model and model.vision_model, each by itself",
    "falcon": "its versions share keys and values in ways of their own; its blocks change in place what they add",
    "mamba": STATES,
    "mamba2": STATES,
    "rwkv": STATES,
    "siglip": "it has two models, of texts and of images: cut model.text_model and model.vision_model, each by itself",
}
