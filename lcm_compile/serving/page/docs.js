// The page of the API: Swagger UI, with the key that the page at `/` keeps for this tab.

import { keyHeaders } from "./server.js";

window.SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#api",
  deepLinking: true,
  requestInterceptor: (request) => {
    Object.assign(request.headers, keyHeaders());
    return request;
  },
});
