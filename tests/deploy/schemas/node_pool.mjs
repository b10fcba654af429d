// Validates NodePools, JSON on standard input, and prints one line for each that is wrong. Run beside node_modules.
import { readFileSync } from "node:fs";
import { NodePool } from "@kubernetes-models/karpenter/karpenter.sh/v1/NodePool";

for (const document of JSON.parse(readFileSync(0, "utf8"))) {
  try {
    new NodePool(document).validate();
  } catch (error) {
    console.log(`NodePool ${document.metadata.name}: ${error.message}`);
  }
}
