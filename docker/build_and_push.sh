#!/usr/bin/env bash
# Build the image of SageMaker jobs and put it into this account's ECR:
#   docker/build_and_push.sh whisper-lora[:TAG] us-east-1 [BASE_IMAGE]
# The last line it prints, with its digest, is the --image_uri for sagemaker_launch.py.
set -euo pipefail

if [[ $# -lt 2 || $# -gt 3 ]]; then
    echo "usage: docker/build_and_push.sh REPOSITORY[:TAG] REGION [BASE_IMAGE]" >&2
    exit 2
fi
name=$1 region=$2
[[ $name == *:* ]] || name=$name:latest
repository=${name%%:*}
deep_learning=763104351884.dkr.ecr.$region.amazonaws.com # AWS's own images; in most regions
base=${3:-$deep_learning/pytorch:2.13-cu133-amzn2023-sagemaker}
cd "$(dirname "$0")/.."

account=$(aws sts get-caller-identity --query Account --output text)
registry=$account.dkr.ecr.$region.amazonaws.com
login() { # REGISTRY REGION
    aws ecr get-login-password --region "$2" | docker login --username AWS --password-stdin "$1"
}

login "$registry" "$region"
if [[ ${base%%/*} =~ \.dkr\.ecr\.([a-z0-9-]+)\.amazonaws\. ]]; then
    login "${base%%/*}" "${BASH_REMATCH[1]}" # the base's own region
fi
aws ecr describe-repositories --region "$region" --repository-names "$repository" >/dev/null 2>&1 ||
    aws ecr create-repository --region "$region" --repository-name "$repository" \
        --image-scanning-configuration scanOnPush=true >/dev/null
# An attestation would make the image a list of two, which SageMaker refuses.
export BUILDX_NO_DEFAULT_ATTESTATIONS=1
docker build --platform linux/amd64 --file docker/Dockerfile \
    --build-arg "BASE_IMAGE=$base" --build-arg "GIT_COMMIT=$(git rev-parse HEAD || true)" --tag "$registry/$name" .
docker push "$registry/$name"
docker inspect --format '{{index .RepoDigests 0}}' "$registry/$name"
