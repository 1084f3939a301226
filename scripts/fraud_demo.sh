#!/usr/bin/env bash
# Runs a day of an anti-fraud service in five minutes: the upstream system's words change while payments are screened; an
# adapter is trained on the new words, tried on a share of the accounts and given to all accounts.
#   scripts/fraud_demo.sh                         the picture goes to runs/fraud_demo/day.png
#   scripts/fraud_demo.sh --seconds 300 --rate 50
EXTRAS="serve,train" source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
exec .venv/bin/python scripts/fraud_demo.py "$@"
