package router

import (
	"net/http"
	"slices"
	"strings"
)

// Upstream routes by media types before its handlers look at a request; the routes are go-restful's (jsr311.go, route.go). The
// same here, so that the same requests are refused, in the same words.

// anyMedia is what a route names that leaves the choice to its handler.
const anyMedia = "*/*"

// octets is what a body without a type is taken for; go-restful's.
const octets = "application/octet-stream"

// mismatch tells why a route that takes some media types and gives others does not serve a request: a status code and go-restful's
// words for it, or 0.
func mismatch(r *http.Request, consumes, produces []string) (code int, message string) {
	if !consumable(r, consumes) {
		return http.StatusUnsupportedMediaType, "415: Unsupported Media Type"
	}
	accept := r.Header.Get("Accept")
	if accept == "" {
		accept = anyMedia
	}
	for _, t := range mediaTypes(accept) {
		if t == anyMedia || slices.Contains(produces, anyMedia) || slices.Contains(produces, t) {
			return 0, ""
		}
	}
	return http.StatusNotAcceptable, "406: Not Acceptable\n\nAvailable representations: " + strings.Join(produces, ", ")
}

func consumable(r *http.Request, consumes []string) bool {
	if len(consumes) == 0 || slices.Contains(consumes, anyMedia) {
		return true
	}
	sent := r.Header.Get("Content-Type")
	if sent == "" {
		switch r.Method {
		case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodDelete, http.MethodTrace:
			return true
		}
		sent = octets
	}
	return slices.ContainsFunc(mediaTypes(sent), func(t string) bool { return slices.Contains(consumes, t) })
}

// mediaTypes splits a header into types without their parameters.
func mediaTypes(header string) []string {
	parts := strings.Split(header, ",")
	for i, p := range parts {
		p, _, _ = strings.Cut(p, ";")
		parts[i] = strings.Trim(p, " ")
	}
	return parts
}
