#!/usr/bin/env bash
# A day of an anti-fraud service in five minutes: payments are screened while the words of the upstream system change, an
# adapter is trained on the new words, tried on a share of the accounts and given to all.
#   scripts/fraud_demo.sh                         the picture goes to runs/fraud_demo/day.png
#   scripts/fraud_demo.sh --seconds 300 --rate 50
EXTRAS="serve,train" source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
exec .venv/bin/python scripts/fraud_demo.py "$@"
