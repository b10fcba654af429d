// Shows the OpenAPI document that the page names. No validator of another host is asked.
"use strict";

const place = document.getElementById("document");
SwaggerUIBundle({ url: place.dataset.url, domNode: place, deepLinking: true, validatorUrl: null });
