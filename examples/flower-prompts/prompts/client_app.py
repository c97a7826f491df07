"""Clients: local training of prompts, under secure aggregation."""

from flwr.clientapp import ClientApp

from secure_fedprompt.flower import secure
from secure_fedprompt.flower.prompts import train

app = ClientApp(mods=[secure])
app.train()(train)
