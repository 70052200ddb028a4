#!/bin/sh
set -e
erasure bench --model canvas --concept dagger --methods negative_prompt,uce --suite canvas --limit 48 --out out/leaderboard
